"""A run: its stages one after another, from images to an exported student."""
