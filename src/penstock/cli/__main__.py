from penstock.cli.app import main

main()
