"""What a patch does, measured: rates and scores, baselines, attacks."""
