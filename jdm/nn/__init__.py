"""The network: a UNet, and a classifier head on its encoder."""
