"""The verbs, one file each: functions that take paths or values and return frozen reports. They print nothing."""
