"""Rewrites of attention sites."""
