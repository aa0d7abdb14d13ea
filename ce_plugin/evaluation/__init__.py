"""Is an explanation right? Ground truth, and measures of faithfulness."""
