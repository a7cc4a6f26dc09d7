"""What happens over time: triggers, the pass, the gate, the trial, commit and rollback."""
