"""jdm data"""

HELP = "Data sets: list, prepare or show."
