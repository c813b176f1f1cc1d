"""The passes: one concern a file, from a captured graph to the rewritten one."""
