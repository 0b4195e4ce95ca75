"""Measurements against peers and bare libraries; `make bench` runs those that fit this machine."""
