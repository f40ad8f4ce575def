"""Playing: episodes, whom they ask, and who judges them."""
