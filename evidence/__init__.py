"""Evidence: comparisons, reports and the charts in them."""
