"""How the bundled weights were made: pictures, captions, autoencoder, training. Not shipped in the wheel."""
