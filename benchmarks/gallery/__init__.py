"""What pages of the gallery quote and takes longer than a page may take."""
