"""The paper's experiments that are no recipe: chest X-rays."""
