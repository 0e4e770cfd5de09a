"""SeqIO tasks and mixtures: one function a corpus. Nothing registers at import."""
