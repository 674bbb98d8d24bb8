"""What is saved, and read back?"""
