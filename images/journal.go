package images

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"go.etcd.io/bbolt"
)

// journal is a text file of the changes of names, one JSON object a line, for
// the day when the catalogue is damaged. It is appended to after each
// transaction, without waiting for the disk, and written anew, with what is
// true then, whenever the catalogue is opened or closed. Failing to write it
// fails nothing else.
type journal struct {
	path  string
	f     *os.File // nil when it cannot be written
	size  int64
	fresh int64 // its size when it was last written anew
	stale bool  // a line could not be written whole
}

// The operations of a journal.
const (
	journalName     = "name"     // Name stands for Image
	journalGone     = "gone"     // Name was removed
	journalDangling = "dangling" // Image has lost its last name, Name
	journalDeleted  = "deleted"  // Image is gone
)

// journalLine is one line.
type journalLine struct {
	Op    string    `json:"op"`
	Name  *Name     `json:"name,omitempty"`
	Image v1.Hash   `json:"image,omitzero"`
	Top   v1.Hash   `json:"top,omitzero"`
	Time  time.Time `json:"time,omitzero"`
	Lost  time.Time `json:"lost,omitzero"`
}

// timeFormat is that of times in bucketTombs.
const timeFormat = time.RFC3339

func openJournal(path string) *journal { return &journal{path: path} }

// slack is how much a journal may grow before it is written anew, beside being
// four times as long as then.
const slack = 1 << 20

func (j *journal) append(c *catalog, lines []journalLine) {
	if j == nil || len(lines) == 0 || j.f == nil {
		return
	}
	var data []byte
	for _, l := range lines {
		line, err := json.Marshal(l)
		if err != nil {
			continue
		}
		data = append(append(data, line...), '\n')
	}
	n, err := j.f.Write(data)
	j.stale = j.stale || err != nil
	if j.size += int64(n); j.stale || j.size > 4*j.fresh+slack {
		j.rewrite(c)
	}
}

// rewrite replaces the journal by one that says what is true now. That of a
// catalogue that is suspect knows more than the catalogue: it is only appended to.
func (j *journal) rewrite(c *catalog) error {
	if j == nil || c.met.Load() {
		return nil
	}
	f, err := os.OpenFile(j.path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	err = func() (err error) {
		defer guard(debug.SetPanicOnFault(true), &err)
		return c.db.View(func(tx *bbolt.Tx) error { return writeNames(w, tx) })
	}()
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(j.path+".new", j.path)
	}
	if err != nil {
		f.Close()
		os.Remove(j.path + ".new")
		c.suspect(err)
		return err
	}
	syncParent(j.path)
	j.close()
	j.f, j.stale = f, false
	if st, err := f.Stat(); err == nil {
		j.size, j.fresh = st.Size(), st.Size()
	}
	return nil
}

func syncParent(path string) {
	if d, err := os.Open(filepath.Dir(path)); err == nil {
		d.Sync()
		d.Close()
	}
}

func (j *journal) close() {
	if j != nil && j.f != nil {
		j.f.Close()
		j.f = nil
	}
}

// writeNames writes the lines that lead to what the catalogue says.
func writeNames(w io.Writer, tx *bbolt.Tx) error {
	enc := json.NewEncoder(w)
	err := tx.Bucket(bucketNames).ForEach(func(k, v []byte) error {
		var rec nameRecord
		if err := decode(bucketNames, k, v, &rec); err != nil {
			return err
		}
		n := parseKey(k)
		return enc.Encode(journalLine{Op: journalName, Name: &n, Image: rec.Image, Top: rec.Top, Time: rec.Time})
	})
	if err != nil {
		return err
	}
	err = tx.Bucket(bucketTombs).ForEach(func(k, v []byte) error {
		n := parseKey(k)
		at, _ := time.Parse(timeFormat, string(v))
		return enc.Encode(journalLine{Op: journalGone, Name: &n, Time: at})
	})
	if err != nil {
		return err
	}
	return tx.Bucket(bucketDangling).ForEach(func(k, v []byte) error {
		var d danglingRecord
		if err := decode(bucketDangling, k, v, &d); err != nil {
			return err
		}
		h, err := v1.NewHash(string(k))
		if err != nil {
			return err
		}
		return enc.Encode(journalLine{Op: journalDangling, Name: &d.Name, Image: h, Top: d.Top, Time: d.Time, Lost: d.Lost})
	})
}

// history is what a journal says.
type history struct {
	names    map[Name]nameRecord
	tombs    map[Name]time.Time
	dangling map[v1.Hash]danglingRecord
	deleted  map[v1.Hash]bool
}

// maxJournalLine bounds one line: two digests, two times, and a name.
const maxJournalLine = 16 << 10

// replayJournal reads a journal. Lines that are none, such as one that a crash
// cut short, are left out and counted.
func replayJournal(r io.Reader) (h history, bad int) {
	h = history{names: map[Name]nameRecord{}, tombs: map[Name]time.Time{}, dangling: map[v1.Hash]danglingRecord{},
		deleted: map[v1.Hash]bool{}}
	in := bufio.NewReaderSize(r, maxJournalLine)
	for {
		data, long, err := in.ReadLine()
		if err != nil {
			return h, bad
		}
		cut := long
		for long && err == nil {
			_, long, err = in.ReadLine()
		}
		if len(data) == 0 {
			continue
		}
		var l journalLine
		if cut || json.Unmarshal(data, &l) != nil || h.apply(l) != nil {
			bad++
		}
	}
}

func (h *history) apply(l journalLine) error {
	if l.Op == journalDeleted {
		h.deleted[l.Image] = true
		delete(h.dangling, l.Image)
		return nil
	}
	if l.Name == nil || l.Op != journalDangling && !l.Name.Valid() {
		return fmt.Errorf("images: the journal of names has the name %v", l.Name)
	}
	switch l.Op {
	case journalName:
		h.names[*l.Name] = nameRecord{Image: l.Image, Top: l.Top, Time: l.Time}
		delete(h.tombs, *l.Name)
		delete(h.dangling, l.Image)
		delete(h.deleted, l.Image)
	case journalGone:
		delete(h.names, *l.Name)
		h.tombs[*l.Name] = l.Time
	case journalDangling:
		h.dangling[l.Image] = danglingRecord{Name: *l.Name, Top: l.Top, Time: l.Time, Lost: l.Lost}
		delete(h.deleted, l.Image)
	default:
		return fmt.Errorf("images: the journal of names has the operation %q", l.Op)
	}
	return nil
}
