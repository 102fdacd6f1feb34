"""`python -m thermocline` is `thermocline`."""

from thermocline.cli import main

if __name__ == "__main__":
    main()
