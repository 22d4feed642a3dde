"""Skills: the taxonomy that tells what they are part of and called, and who has them."""
