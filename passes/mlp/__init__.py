"""Rewrites of feed-forward layers."""
