model = 'hope'
