"""A committed candidate on trial: canaries and the feedback that it gets."""
