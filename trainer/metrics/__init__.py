"""What a run says about itself: records, the sinks that take them, throughput and GPU readings."""
