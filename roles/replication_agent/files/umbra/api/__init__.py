"""What an operator and a monitoring system see: status, health, metrics."""
