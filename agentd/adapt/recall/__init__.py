"""Past corrections in the prompt, until the weights know better."""
