"""Who vouches for a version, and whose word counts: signatures, their keys, and the list of whom one trusts."""
