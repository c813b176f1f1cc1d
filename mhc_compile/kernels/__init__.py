"""The mHC ops: ``reference`` is the oracle, ``plain`` runs anywhere, ``ops`` registers them with torch."""
