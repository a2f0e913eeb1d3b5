"""A small pretrained Llama-architecture decoder, with what trained it and what exports it."""
