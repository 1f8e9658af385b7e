"""Messages in transit: shadow before 250, discard, back-fill and resubmission."""
