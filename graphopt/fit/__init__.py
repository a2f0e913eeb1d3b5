"""Training what a pass put in: recording what happens at each site, and distilling from it."""
