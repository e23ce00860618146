"""The maths of diffusion: schedules, samplers, guidance. Knows functions, not networks."""
