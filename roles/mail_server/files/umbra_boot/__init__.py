"""What a mail host does once after each boot, before Dovecot starts."""
