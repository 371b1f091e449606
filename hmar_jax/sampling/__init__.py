"""label + schedule → tokens: schedules as data, filters and the jitted loop."""
