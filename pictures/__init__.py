"""Pictures that nodes return beside their result: maps and subjects drawn over pictures, plots of a run, flicker."""
