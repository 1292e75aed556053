package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/q-ipsec/q-ipsec"

// Budgets of docs/architecture.md.
const (
	maxFuncLines = 80
	maxFileLines = 800
)

// pkg is one package of the module, parsed and type-checked, tests left out.
type pkg struct {
	PkgPath, Name string
	Imports       []string
	Fset          *token.FileSet
	Syntax        []*ast.File
	TypesInfo     *types.Info
}

// listed is what `go list` says of a package.
type listed struct {
	ImportPath, Name, Dir, Export string
	GoFiles, Imports              []string
	Module                        *struct{ Path string }
}

// load reads the whole module once.
var load = sync.OnceValues(func() ([]*pkg, error) {
	cmd := exec.Command("go", "list", "-deps", "-export", "-json=ImportPath,Name,Dir,Export,GoFiles,Imports,Module", "./...")
	cmd.Dir = "../.."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	export := map[string]string{}
	var ours []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var l listed
		if err := d.Decode(&l); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		export[l.ImportPath] = l.Export
		if l.Module != nil && l.Module.Path == module {
			ours = append(ours, l)
		}
	}
	fset := token.NewFileSet()
	imp := importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(export[path]) })
	var pkgs []*pkg
	for _, l := range ours {
		p := &pkg{PkgPath: l.ImportPath, Name: l.Name, Imports: l.Imports, Fset: fset, TypesInfo: &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}, Defs: map[*ast.Ident]types.Object{}}}
		for _, name := range l.GoFiles {
			f, err := parser.ParseFile(fset, filepath.Join(l.Dir, name), nil, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				return nil, err
			}
			p.Syntax = append(p.Syntax, f)
		}
		if _, err := (&types.Config{Importer: imp}).Check(l.ImportPath, fset, p.Syntax, p.TypesInfo); err != nil {
			return nil, err
		}
		pkgs = append(pkgs, p)
	}
	return pkgs, nil
})

func all(t *testing.T) []*pkg {
	t.Helper()
	pkgs, err := load()
	if err != nil {
		t.Fatal(err)
	}
	if len(pkgs) < 15 {
		t.Fatalf("only %d packages", len(pkgs))
	}
	return pkgs
}

// rel is the package's path within the module.
func rel(path string) string { return strings.TrimPrefix(path, module+"/") }

// free tells the packages that may use everything: programs and tests.
func free(name string) bool {
	return strings.HasPrefix(name, "cmd/") || strings.HasPrefix(name, "testenv/") || strings.HasPrefix(name, "scripts/")
}

var quoted = regexp.MustCompile("`([^`]+)`")

// rules reads the table: package to the packages of ours that it may import.
func rules(t *testing.T) map[string][]string {
	t.Helper()
	b, err := os.ReadFile("../../docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "## Packages\n")
	if !ok {
		t.Fatal("docs/architecture.md has no section Packages")
	}
	text, _, _ = strings.Cut(text, "\n## ")
	out := map[string][]string{}
	for _, line := range strings.Split(text, "\n") {
		cells := strings.Split(strings.Trim(line, "| "), "|")
		if !strings.HasPrefix(line, "| `") || len(cells) != 3 {
			continue
		}
		var allowed []string
		for _, w := range strings.Split(cells[2], ",") {
			switch w = strings.TrimSpace(w); w {
			case "nothing", "-", "":
			default:
				allowed = append(allowed, w)
			}
		}
		var first string
		for i, m := range quoted.FindAllStringSubmatch(cells[0], -1) {
			name := m[1]
			if i == 0 {
				first = name
				out[name] = allowed
				continue
			}
			if !strings.HasPrefix(name, first+"/") {
				name = first + "/" + name
			}
			out[name] = append(slices.Clone(allowed), first)
		}
	}
	if len(out) < 15 {
		t.Fatalf("only %d packages are in the table", len(out))
	}
	for pkg, allowed := range out { // "key" is kms/key
		for i, a := range allowed {
			if _, ok := out[a]; !ok {
				allowed[i] = "kms/" + a
			}
			if _, ok := out[allowed[i]]; !ok && a != "all" {
				t.Errorf("%s may import %q, which is no package of the table", pkg, a)
			}
		}
	}
	return out
}

// Each package imports only those of ours that the table lets it.
func TestImportsFollowTheTable(t *testing.T) {
	table := rules(t)
	seen := map[string]bool{}
	for _, p := range all(t) {
		name := rel(p.PkgPath)
		if free(name) {
			continue
		}
		allowed, ok := table[name]
		if !ok {
			t.Errorf("package %s is not in the table of docs/architecture.md", name)
		}
		seen[name] = true
		for _, path := range p.Imports {
			if to := rel(path); to != path && !slices.Contains(allowed, to) {
				t.Errorf("%s imports %s; the table of docs/architecture.md allows %v", name, to, allowed)
			}
		}
	}
	for pkg := range table {
		if !seen[pkg] && pkg != "cmd/..." && pkg != "ike/charon" {
			t.Errorf("the table of docs/architecture.md has %s, which is no package", pkg)
		}
	}
}

// doors are libraries that only one part may touch, with the reason.
var doors = []struct {
	library string
	only    []string
	why     string
}{
	{"github.com/vishvananda/netlink", []string{"sad/xfrm"}, "its values print keys; one package keeps them in"},
	{"database/sql", []string{"kms/store"}, "the inventory is the only user of SQL"},
	{"modernc.org/sqlite", []string{"kms/store"}, "the inventory is the only user of SQL"},
	{"github.com/strongswan/govici", []string{"ike/vici"}, "its limits are handled in one place"},
	{"github.com/BurntSushi/toml", []string{"conf"}, "configs are read strictly, in one place"},
	{"github.com/pkg/sftp", []string{"qkdsim"}, "only the simulated device is an SFTP client"},
	{"math/rand", []string{"qkdsim", "ike", "kms/store/storetest"}, "secrets and nonces come from crypto/rand; ike draws the jitter of its pauses"},
	{"unsafe", []string{"kms/key"}, "only key.Material lies outside the heap"},
	{"log", nil, "logs are log/slog, passed in"},
	{"testing", nil, "production code does not link the test framework; packages that end in test may"},
}

func TestLibrariesStayBehindTheirDoors(t *testing.T) {
	for _, p := range all(t) {
		name := rel(p.PkgPath)
		for _, path := range p.Imports {
			for _, d := range doors {
				if path != d.library && !strings.HasPrefix(path, d.library+"/") || d.library == "log" && path != "log" {
					continue
				}
				inside := slices.Contains(d.only, name)
				if d.library == "testing" {
					inside = strings.HasSuffix(name, "test")
				}
				if !inside && !strings.HasPrefix(name, "testenv/") {
					t.Errorf("%s imports %s: %s", name, path, d.why)
				}
			}
		}
	}
}

// Each package has exactly one package comment.
func TestPackageComments(t *testing.T) {
	for _, p := range all(t) {
		n := 0
		for _, f := range p.Syntax {
			if f.Doc != nil {
				n++
				want := "Package " + p.Name
				if p.Name == "main" {
					want = "Command "
				}
				if !strings.HasPrefix(f.Doc.Text(), want) {
					t.Errorf("%s: the package comment does not begin with %q", rel(p.PkgPath), want)
				}
			}
		}
		if n != 1 {
			t.Errorf("%s has %d package comments, want one", rel(p.PkgPath), n)
		}
	}
}

// Every exported name outside of programs is documented.
func TestExportedNamesAreDocumented(t *testing.T) {
	for _, p := range all(t) {
		if p.Name == "main" {
			continue
		}
		for _, f := range p.Syntax {
			for _, d := range f.Decls {
				undocumented(p, d, func(pos token.Pos, name string) {
					t.Errorf("%s: exported %s has no comment", p.Fset.Position(pos), name)
				})
			}
		}
	}
}

func undocumented(p *pkg, d ast.Decl, report func(token.Pos, string)) {
	switch d := d.(type) {
	case *ast.FuncDecl:
		errorMethod := d.Recv != nil && d.Name.Name == "Error" // says what every Error says
		if d.Doc == nil && d.Name.IsExported() && !errorMethod && (d.Recv == nil || ast.IsExported(receiver(d))) {
			report(d.Pos(), d.Name.Name)
		}
	case *ast.GenDecl:
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				if s.Name.IsExported() && d.Doc == nil && s.Doc == nil {
					report(s.Pos(), s.Name.Name)
				}
			case *ast.ValueSpec:
				for _, n := range s.Names {
					if n.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
						report(n.Pos(), n.Name)
					}
				}
			}
		}
	}
}

func receiver(d *ast.FuncDecl) string {
	x := d.Recv.List[0].Type
	if s, ok := x.(*ast.StarExpr); ok {
		x = s.X
	}
	if i, ok := x.(*ast.IndexExpr); ok {
		x = i.X
	}
	if id, ok := x.(*ast.Ident); ok {
		return id.Name
	}
	return ""
}

// calls visits every call of a named function or method.
func calls(p *pkg, visit func(c *ast.CallExpr, f *types.Func)) {
	for _, file := range p.Syntax {
		ast.Inspect(file, func(n ast.Node) bool {
			c, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			var id *ast.Ident
			switch x := ast.Unparen(c.Fun).(type) {
			case *ast.Ident:
				id = x
			case *ast.SelectorExpr:
				id = x.Sel
			default:
				return true
			}
			if f, ok := p.TypesInfo.Uses[id].(*types.Func); ok && f.Pkg() != nil {
				visit(c, f)
			}
			return true
		})
	}
}

// A context comes from main or a test; an init function, a panic that is not
// about a broken invariant, and the default logger have no place.
func TestForbiddenCalls(t *testing.T) {
	for _, p := range all(t) {
		name := rel(p.PkgPath)
		calls(p, func(c *ast.CallExpr, f *types.Func) {
			at := p.Fset.Position(c.Pos())
			switch full := f.FullName(); {
			case (full == "context.Background" || full == "context.TODO") && !free(name):
				t.Errorf("%s: %s: take a context from the caller", at, full)
			case strings.HasPrefix(full, "log/slog.Default") || full == "log/slog.SetDefault":
				t.Errorf("%s: %s: loggers are passed in", at, full)
			case full == "os.Exit" && !strings.HasPrefix(name, "cmd/") && !strings.HasPrefix(name, "testenv/"):
				t.Errorf("%s: os.Exit outside of a program", at)
			}
		})
		for _, file := range p.Syntax {
			for _, d := range file.Decls {
				if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
					t.Errorf("%s: init function: nothing registers itself", p.Fset.Position(f.Pos()))
				}
			}
		}
	}
}

// printers are the packages whose functions may show their arguments.
var printers = []string{"fmt", "log/slog", "encoding/json", "encoding/hex", "errors", "strconv"}

// Key bytes never reach a printer: neither a Material, nor the bytes of one, nor
// a string made of them.
func TestKeyBytesAreNotPrinted(t *testing.T) {
	for _, p := range all(t) {
		calls(p, func(c *ast.CallExpr, f *types.Func) {
			if !slices.Contains(printers, f.Pkg().Path()) {
				return
			}
			for _, arg := range c.Args {
				ast.Inspect(arg, func(n ast.Node) bool {
					x, ok := n.(ast.Expr)
					if !ok {
						return true
					}
					if call, ok := x.(*ast.CallExpr); ok && harmless(p, call) {
						return false // what it gives is no key byte: look no deeper
					}
					if secret(p, x) {
						t.Errorf("%s: key material is passed to %s", p.Fset.Position(arg.Pos()), f.FullName())
						return false
					}
					return true
				})
			}
		})
	}
}

// harmless tells the calls that give something public of a Material.
func harmless(p *pkg, c *ast.CallExpr) bool {
	s, ok := ast.Unparen(c.Fun).(*ast.SelectorExpr)
	if !ok {
		return false
	}
	switch s.Sel.Name {
	case "Fingerprint", "Len", "Equal":
		return isMaterial(p.TypesInfo.TypeOf(s.X))
	}
	return false
}

// secret tells an expression of type Material, and m.Bytes().
func secret(p *pkg, x ast.Expr) bool {
	if isMaterial(p.TypesInfo.TypeOf(x)) {
		return true
	}
	c, ok := x.(*ast.CallExpr)
	if !ok {
		return false
	}
	s, ok := ast.Unparen(c.Fun).(*ast.SelectorExpr)
	return ok && s.Sel.Name == "Bytes" && isMaterial(p.TypesInfo.TypeOf(s.X))
}

func isMaterial(t types.Type) bool {
	if t == nil {
		return false
	}
	if ptr, ok := t.(*types.Pointer); ok {
		t = ptr.Elem()
	}
	n, ok := t.(*types.Named)
	return ok && n.Obj().Name() == "Material" && n.Obj().Pkg() != nil && n.Obj().Pkg().Path() == module+"/kms/key"
}

// Functions and files stay small enough to be read.
func TestBudgets(t *testing.T) {
	for _, p := range all(t) {
		for _, f := range p.Syntax {
			name := p.Fset.Position(f.Pos()).Filename
			if n := p.Fset.File(f.Pos()).LineCount(); n > maxFileLines {
				t.Errorf("%s has %d lines, at most %d", base(name), n, maxFileLines)
			}
			for _, d := range f.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok {
					if n := p.Fset.Position(fn.End()).Line - p.Fset.Position(fn.Pos()).Line + 1; n > maxFuncLines {
						t.Errorf("%s: %s has %d lines, at most %d", p.Fset.Position(fn.Pos()), fn.Name.Name, n, maxFuncLines)
					}
				}
			}
		}
	}
}

func base(name string) string {
	return fmt.Sprintf("%s/%s", filepath.Base(filepath.Dir(name)), filepath.Base(name))
}

// Nothing unfinished is left in the tree's own code.
func TestNothingUnfinished(t *testing.T) {
	marks := regexp.MustCompile(`\b(TODO|FIXME|XXX)\b`)
	for _, p := range all(t) {
		for _, f := range p.Syntax {
			for _, g := range f.Comments {
				if m := marks.FindString(g.Text()); m != "" && !strings.Contains(p.PkgPath, "archtest") {
					t.Errorf("%s: %s", p.Fset.Position(g.Pos()), m)
				}
			}
		}
	}
}
