"""What people would use instead: small programs that do a part's work with another library and print their figure."""
