"""What turns a model into a Graph: one file per kind of source."""
