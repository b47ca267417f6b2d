"""From k-space to coefficient images (§2.8), and the digital brain that has a known truth."""
