"""How the network learns: the joint loss, one step, and what builds them from a config."""
