"""Pure maths: schedule, latents, guidance and the one denoising loop. It takes the networks as callables."""
