"""Stand-ins, factories and waiting functions shared by many tests."""
