"""The network: a UNet and a classifier on its encoder."""
