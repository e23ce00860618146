"""Configs: base.py has every key and its default; the others hold only what differs."""
