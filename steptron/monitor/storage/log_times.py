"""Times in log files, in UTC: nodes, and the machines on which logs are read, may be in other time zones."""

import logging
import time


class StampedFormatter(logging.Formatter):
    """Formats `%(asctime)s` as 2026-01-31T23:59:59.123Z."""

    converter = time.gmtime
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"
