"""Before a pass: its examples, the memory there is, and the plan that fits both."""
