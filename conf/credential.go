package conf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
)

// credentialsEnv is where systemd puts what LoadCredential= and its like load.
const credentialsEnv = "CREDENTIALS_DIRECTORY"

var credentialNames = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$`)

func credentialName(s string) (string, error) {
	if !credentialNames.MatchString(s) {
		return "", errors.New("want the name of a systemd credential, or a path with a slash")
	}
	return s, nil
}

// CredentialPath is the file of RootCredential; empty if there is none. A name
// is one of this process's own credentials.
func (n *Node) CredentialPath() (string, error) {
	if n.RootCredential == "" || filepath.IsAbs(n.RootCredential) {
		return n.RootCredential, nil
	}
	dir := os.Getenv(credentialsEnv)
	if dir == "" {
		return "", fmt.Errorf("node.root_credential is %q, but $%s is not set: this process was not started by systemd with LoadCredentialEncrypted=%s", n.RootCredential, credentialsEnv, n.RootCredential)
	}
	return filepath.Join(dir, n.RootCredential), nil
}
