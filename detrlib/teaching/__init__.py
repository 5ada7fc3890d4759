"""Pictures and exercises of the walkthroughs. Nothing else imports it."""
