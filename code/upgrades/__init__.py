"""What was published since to improve Proxy-Anchor, each off by default: see docs/upgrades.md."""
