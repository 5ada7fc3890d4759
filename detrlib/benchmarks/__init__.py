"""Speed, memory and accuracy beside other implementations. Nothing else imports it."""
