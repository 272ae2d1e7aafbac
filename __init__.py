"""elsewhere: masked-image pre-training of vision transformers that are not told exactly where a masked patch is."""
