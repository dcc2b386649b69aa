"""Makes the embedded model: reader, autoencoder, text encoder, UNet, one after the other."""
