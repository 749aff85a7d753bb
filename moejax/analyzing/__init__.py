"""What `moejax analyze` is made of: whose routing, and its tables, figures and page."""
