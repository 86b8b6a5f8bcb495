"""What tests of every level stand on: real servers, a real mailbox, the three processes."""
